"""`pages`: reports as one HTML file each, with everything in it, what strangers wrote escaped; and Markdown tables."""
