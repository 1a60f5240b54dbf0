"""What a run achieved, measured on data that it did not train on."""
