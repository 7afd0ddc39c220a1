"""The method: what plans do in the loss."""
