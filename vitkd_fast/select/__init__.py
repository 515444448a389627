"""`vitkd select`: which student, or which loss, by repeated splits of the training images.

candidates  what is compared, and a configuration for each
trials      a candidate trained on a split, once; its score is kept
statistics  corrected tests, when the choice is stable, and how often it was another
run         the splits, one after another, until the choice is stable
report      the page, the JSON and the table
"""
