"""`audit`: finds the captions of a data set that do not belong to their images."""
