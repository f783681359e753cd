"""LoRAs in the low-rank branch of converted layers, without quantizing again."""
