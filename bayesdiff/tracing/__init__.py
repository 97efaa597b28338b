"""Any PyTorch code, followed op by op: values as they are, tangents beside them."""
