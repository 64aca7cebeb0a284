"""What is known of callables beside the proof of their names: task objects of other libraries, sentences of refusals."""
