"""shoal: one large language model on many ordinary machines."""
