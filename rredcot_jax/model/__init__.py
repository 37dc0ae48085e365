"""The policy: decoder, sampling, scoring, and the checkpoints of others."""
