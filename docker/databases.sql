-- psql runs this once, when the server's data directory is new. The tables are made by the services.
--
-- Each service, and the simulated payment provider, has a database and a role that owns it and may connect to no other. The relay's
-- role may connect to the three databases with an outbox, and has the rights there that `outbox_grant` gives it
-- (migrations/messaging/V16): a service's migrations do that for the role which the database names.

-- Passwords come from the environment. A statement that fails would be logged with its password.
set log_min_error_statement = panic;
\getenv orders_password ORDERS_DB_PASSWORD
\getenv payments_password PAYMENTS_DB_PASSWORD
\getenv inventory_password INVENTORY_DB_PASSWORD
\getenv gateway_password GATEWAY_DB_PASSWORD
\getenv relay_password RELAY_DB_PASSWORD

create role orders login password :'orders_password';
create role payments login password :'payments_password';
create role inventory login password :'inventory_password';
create role gateway login password :'gateway_password';
create role relay login password :'relay_password';

create database orders owner orders;
create database payments owner payments;
create database inventory owner inventory;
create database gateway owner gateway;

revoke all on database orders, payments, inventory, gateway, postgres, template1 from public;
grant connect on database orders, payments, inventory to relay;
alter database orders set outbox.relay_role = 'relay';
alter database payments set outbox.relay_role = 'relay';
alter database inventory set outbox.relay_role = 'relay';
