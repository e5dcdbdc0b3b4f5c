-- A database per service, and one for the simulated payment provider. Their tables are made by the services.
create database orders;
create database payments;
create database inventory;
create database gateway;
