#!/bin/sh
# Builds the documents as a book: `sh docs/book.sh FOLDER` leaves it in FOLDER/html. MDBOOK names the program. mdBook takes
# one source folder and copies all of it, so the documents, and the sources that they link to, are copied to a folder of
# their own first.
set -eu

book=$1
rm -rf "$book"
mkdir -p "$book/source"
# Without git, all but what is built is taken.
files() {
  git ls-files --cached --others --exclude-standard 2>/dev/null ||
    find . \( -name .git -o -name target -o -name .stack -o -path "./$book" -o -path ./docker/.env \) -prune -o -type f -print
}
files | while read -r file; do
  # A file that was removed, and not from the index yet, is not there.
  [ ! -e "$file" ] || echo "$file"
done | tar -cf - -T - | tar -xf - -C "$book/source"
cp docs/book.toml "$book/"
# The summary names its pages from its own folder; mdBook wants it in the source folder.
sed -e 's|](\([a-z]\)|](docs/\1|' -e 's|](\.\./|](|' docs/SUMMARY.md > "$book/source/SUMMARY.md"
rm "$book/source/docs/SUMMARY.md"
"$MDBOOK" build "$book"
