"""What is known of callables beside the proof of their names: patterns, task objects of other libraries, sentences of refusals, getters of the interpreter."""
