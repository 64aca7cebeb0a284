"""The tags of typed values, by what they carry."""
