"""What the programs of results/ share."""
