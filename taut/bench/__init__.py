"""`taut bench`: Taut beside its peers in one process, with the same weights, as tables, JSON and plots."""
