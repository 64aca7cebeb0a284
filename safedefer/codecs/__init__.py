"""Argument codecs: values to JSON and back."""
