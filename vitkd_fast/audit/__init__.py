"""`vitkd audit`: what compression did to a model, measured beside its teacher.

answers     what both say of every image
fidelity    how close the student's answers are to the teacher's
calibration whether probabilities are what they say, and the temperature that makes them so
harm        which classes and groups lost accuracy, with intervals and corrected tests
conditions  corruptions and augmentations of images; robustness: whose answer they flip
attention   where both look, and the overlap
cost        time, memory and energy of an image
report      the page, the JSON and the table
"""
