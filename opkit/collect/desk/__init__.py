"""What a collection says of itself: read back, put into curves, looked over for what stands out."""
