"""The paper on tensors and text: roles, templates, the ball, the loss, the prompt embeddings, the one training loop."""
