"""Google Cloud Tasks: a push engine, the check of who pushes, and an emulator of the service for tests."""
