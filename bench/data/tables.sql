CREATE TABLE people (id INTEGER PRIMARY KEY, name TEXT, born INTEGER, town TEXT);
CREATE TABLE orders (id INTEGER PRIMARY KEY, person INTEGER REFERENCES people(id), amount REAL, paid INTEGER);
INSERT INTO people VALUES (1, 'Ada', 1815, 'London'), (2, 'Emmy', 1882, 'Erlangen'), (3, 'Grace', 1906, 'New York'), (4, 'Rosa', 1923, 'London');
INSERT INTO orders VALUES (1, 1, 12.5, 1), (2, 1, 7, 0), (3, 2, 30, 1), (4, 3, 4.25, 0), (5, 3, 8, 1), (6, 3, 1, 1);
