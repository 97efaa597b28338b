r"""How L tangents go through one operation of PyTorch.

For each operation there is one of

- a rule: a handful of torch calls on the ``(L, *shape)`` tangents, for what samplers are made of;
- ``vmap(op)``, for an operation that is linear in its dual arguments;
- one derivative of each element, ``t · f'(x)``, for an operation that acts on elements;
- ``vmap(jvp(op))``, for everything else.

Which one, is looked up by the function once and remembered.
"""
