"""Train the zoo models ``earth-sd`` and ``earth-sd3``: text-to-image models of NASA Blue Marble patches."""
