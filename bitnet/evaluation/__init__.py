"""How good a model is: held-out loss, agreement with a float model, the comparison of all methods."""
