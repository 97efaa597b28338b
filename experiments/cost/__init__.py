"""What tangents cost beyond the network calls."""
