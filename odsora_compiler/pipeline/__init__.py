"""Passes, their options, the pipeline text, the manager that runs them and its instruments."""
