"""What operators see of processes: numbers of events and of the store, health, and the state that systemd asks for."""
