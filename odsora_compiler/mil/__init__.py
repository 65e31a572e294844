"""Reading, writing and running of saved Core ML packages without Core ML."""
