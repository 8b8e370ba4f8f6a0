"""What happens in one optimiser step, without the trainer: streams, extra passes, weights, agreement between ranks."""
