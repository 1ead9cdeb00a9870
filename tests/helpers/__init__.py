"""What several tests are made of: tiny models and tokenizers, edits of them, a Hub."""
