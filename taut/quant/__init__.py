"""Small formats of weights, one flat file each: how a matrix is packed, multiplied and named on disk."""
