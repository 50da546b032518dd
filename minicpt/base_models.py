from pathlib import Path
MICRO = Path(__file__).parent / "assets" / "micro"
