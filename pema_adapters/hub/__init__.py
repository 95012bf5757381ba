"""What goes to the Hub: merged checkpoints, straight from their plan, and the cards of models and adapters."""
