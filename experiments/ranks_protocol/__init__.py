"""Do ranks that adapt help? The protocol that answers, as one command."""
