"""`audit`: which captions of a data set do not belong to their images, as transport plans see it."""
