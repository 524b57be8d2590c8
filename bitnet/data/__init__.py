"""From documents to training batches: corpora, tokens, mixtures, conversations."""
