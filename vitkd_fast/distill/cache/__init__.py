"""What a teacher said of every augmented image, in files, for students that never wait for it."""

from .plan import Plan as Plan
from .store import CacheError as CacheError
