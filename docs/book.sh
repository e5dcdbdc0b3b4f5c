#!/bin/sh
# Builds the documents as a book: `sh docs/book.sh FOLDER` leaves it in FOLDER/html. MDBOOK names the program. mdBook takes
# one source folder and copies all of it, so the documents, and the sources that they link to, are copied to a folder of
# their own first.
set -eu

book=$1
rm -rf "$book"
mkdir -p "$book/source"
find . \( -name target -o -name .git -o -name .stack -o -path ./docker/.env \) -prune -o -type f -print |
  tar -cf - -T - | tar -xf - -C "$book/source"
cp docs/book.toml "$book/"
# The summary names its pages from its own folder; mdBook wants it in the source folder.
sed -e 's|](\([a-z]\)|](docs/\1|' -e 's|](\.\./|](|' docs/SUMMARY.md > "$book/source/SUMMARY.md"
rm "$book/source/docs/SUMMARY.md"
"$MDBOOK" build "$book"
