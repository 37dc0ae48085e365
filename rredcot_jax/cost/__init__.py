"""What compiled programs cost."""
