"""The method: how transport plans are made, and how the loss uses them."""
