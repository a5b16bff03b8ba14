"""The operations models are made of; each file holds one op, its plain PyTorch reference first."""
