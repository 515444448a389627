"""Students searched for on a device: see `study.Search`."""
