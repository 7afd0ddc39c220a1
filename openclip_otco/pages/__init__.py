"""`pages`: reports as one HTML file each, with everything in it; what strangers wrote is escaped."""
