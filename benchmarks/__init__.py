"""What supports the project's claims (README.md). Nothing in ktda_jax imports this."""
