"""What proves the project to its developers; README.md says what each check proves and how long it takes."""
