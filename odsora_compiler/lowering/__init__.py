"""From a program to Core ML packages: legalization, conversion, weight templates, bundles."""
