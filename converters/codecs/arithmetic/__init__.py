"""The codecs' decode and encode on torch tensors; what they need to know of a format stands beside them."""
