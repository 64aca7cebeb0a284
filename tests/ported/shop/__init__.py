"""A shop as it was on App Engine: models, tasks and the handlers that defer them. Not one call was made for safedefer."""
