"""`scenes`: rendered pictures with captions, the embedded default data set."""
