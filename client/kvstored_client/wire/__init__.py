"""What both ends of the wire share: generated messages, their conversions, frames, addresses. No I/O."""
