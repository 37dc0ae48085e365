"""The decoder behind the method: one model file, one attention file, one record of sizes."""
