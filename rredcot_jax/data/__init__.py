"""Tasks, corpora, verifiers and batches: text becomes token ids here."""
