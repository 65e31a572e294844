"""From a model file to a program: loading the file, tracing the module, finding its weights."""
